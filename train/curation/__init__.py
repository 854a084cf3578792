"""Data curation behind train/curate.py: sources, transcription, scoring, reasons, report, instruction data."""
