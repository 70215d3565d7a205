"""GGUF files for llama.cpp: written here, and run there before they count as written."""
