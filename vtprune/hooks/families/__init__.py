"""One file per Hugging Face architecture family: the only files that know HF module names."""
