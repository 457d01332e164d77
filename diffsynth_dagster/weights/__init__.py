"""Model files: find them, recognise them, build and load the modules; LoRA files."""
