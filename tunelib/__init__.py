"""tunelib trains and fine-tunes language models from one typed TOML file with one readable train.py."""
