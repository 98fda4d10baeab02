"""Other programs' formats: GGUF, CTranslate2 and DeciLM, each read back and compared in logits."""
