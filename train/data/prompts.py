"""Phrasings of every task: the table to read, and to add to.

`CORE` is what runs draw from unless `data.more_phrasings` is set; the recipes of the nano preset were measured with it.
Fields in braces: {name} a slot, {language} what to translate into.
"""

from __future__ import annotations

CORE: dict[str, tuple[str, ...]] = {
    "asr": (
        "Transcribe the audio.",
        "Write down what is said.",
        "What does the speaker say?",
        "Repeat the speech as text.",
    ),
    "first_word": ("What is the first word?", "Which word comes first?"),
    "last_word": ("What is the last word?", "Which word comes last?"),
    "capitals": ("Transcribe the audio in capital letters.", "Write what is said in upper case."),
    "slot": ("Which {name} is mentioned?", "What {name} does the speaker name?"),
    "translate": (
        "Translate the speech into {language}.",
        "What does the speaker say, in {language}?",
        "Give a {language} translation of the audio.",
        "Listen and write the meaning in {language}.",
        "Render what is said in {language}.",
    ),
    "emotion": (
        "What emotion does the speaker show?",
        "How does the speaker feel?",
        "Name the emotion in the voice.",
        "Which emotion do you hear?",
        "Recognise the speaker's emotional state.",
    ),
    "gender": (
        "What is the speaker's gender?",
        "Is the speaker male or female?",
        "Judge the speaker's gender by the voice.",
        "Does a man or a woman speak?",
    ),
    "age": (
        "How old is the speaker?",
        "What is the speaker's age?",
        "Estimate the speaker's age.",
        "Which age group does the speaker belong to?",
    ),
    "speaker_count": (
        "How many people speak?",
        "Count the speakers.",
        "What is the number of speakers in the audio?",
        "How many different voices do you hear?",
    ),
    "sound": (
        "What sound is this?",
        "Classify the sound.",
        "What do you hear in the recording?",
        "Name the sound event.",
        "Which class of sound does the audio belong to?",
    ),
    "spoken_qa": (
        "Answer the question in the audio.",
        "Listen to the question and answer it.",
        "What is the answer to the spoken question?",
        "Reply to what the speaker asks.",
        "Someone asks a question. Answer it.",
    ),
    "instruction": (
        "Follow the instruction in the audio.",
        "Do what the speaker asks for.",
        "Listen to the request and carry it out.",
        "Respond to the spoken instruction.",
    ),
}
THEN = "Transcribe the audio, then answer: "  # the paper's stage-3 format

MORE: dict[str, tuple[str, ...]] = {
    "asr": (
        "Please write out the speech.",
        "Type what you hear.",
        "Convert the speech to text.",
        "What are the words in this recording?",
        "Give me a transcript.",
        "Listen and transcribe.",
    ),
    "first_word": ("Name the word that the speech begins with.", "What does the speaker say first?"),
    "last_word": ("Name the word that the speech ends with.", "What does the speaker say last?"),
    "capitals": ("Give the transcript in capitals.", "Type the words you hear, all in upper case."),
    "slot": ("Name the {name}.", "Which {name} do you hear?", "Tell me the {name} in the audio."),
}
MORE_THEN = (
    "First transcribe the audio. Then answer: ",
    "Write down what is said, then answer: ",
    "Give the transcript, and after it the answer: ",
)
