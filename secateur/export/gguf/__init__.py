"""Export to GGUF files for llama.cpp, which are run in llama.cpp before they appear."""
