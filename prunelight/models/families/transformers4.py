"""Families that transformers 4.57 knows, written by tests/support/transformers4_families.py."""

MODEL_TYPES = frozenset(
    """
    apertus arcee aria_text bamba bart bert bert-generation big_bird bigbird_pegasus biogpt
    bitnet blenderbot blenderbot-small bloom blt camembert code_llama codegen cohere cohere2
    cpmant ctrl data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 electra emu3
    ernie ernie4_5 ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba flex_olmo fuyu gemma
    gemma2 gemma3 gemma3_text gemma3n gemma3n_text git glm glm4 glm4_moe got_ocr2 gpt-sw3 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granitemoe
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe jamba jetmoe lfm2
    llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart mega megatron-bert minimax
    ministral mistral mixtral mllama modernbert-decoder moshi mpt musicgen musicgen_melody mvp
    nemotron olmo olmo2 olmo3 olmoe open-llama openai-gpt opt pegasus persimmon phi phi3
    phi4_multimodal phimoe plbart prophetnet qdqbert qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next
    recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert roformer rwkv
    seed_oss smollm3 speech_to_text_2 stablelm starcoder2 transfo-xl trocr vaultgemma whisper
    xglm xlm xlm-prophetnet xlm-roberta xlm-roberta-xl xlnet xlstm xmod zamba zamba2
    """.split()  # noqa: SIM905
)
