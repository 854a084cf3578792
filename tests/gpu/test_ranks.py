"""FSDP2 over one GPU (nccl, a mesh of one; gloo in a rehearsal): a sharded model's loss and gradients are its own."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from bench import parts

pytestmark = pytest.mark.gpu
SIZE = parts.Size(
    d_enc=32, enc_layers=2, enc_heads=2, mels=80, hidden=64, layers=2, heads=2, kv_heads=1, ffn=96, vocab=300
)


@pytest.fixture
def mesh(device, tmp_path):
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def test_sharded_step(device, mesh):
    plain = parts.model(SIZE, device)
    batch = parts.speech(SIZE, 3, 40, 4, device)
    prompt = parts.prompt(SIZE, 3, 9, 5, device, plain.config.audio_token_id)
    inputs = {"encoder_frames": batch.frames, "frame_lengths": batch.lengths, "ctc_targets": batch.targets}
    inputs.update(prompt, ctc_target_lengths=batch.target_lengths)
    sharded = copy.deepcopy(plain)
    for layer in sharded.causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = []
    for model in (plain, sharded):
        out = model(**inputs)
        out.loss.backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    grads = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert any("audio_feature_head" in name for name in grads)
    for name, p in sharded.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad.full_tensor(), grads[name])
