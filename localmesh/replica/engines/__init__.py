"""The engines: llama (GGUF), minilm (sentence embeddings), process (any backend that speaks backend.Backend)."""
