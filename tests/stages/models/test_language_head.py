"""The head on final hidden states gives the logits of the model itself, for several families."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from schemas.errors import ConfigError, StoreError
from stages.models.causal_lm.language_head import LanguageHead, head_features

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.5,  # logits large enough for a soft-cap or a scale to show
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, final_logit_softcapping=3.0),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, final_logit_softcapping=2.0),
    "phi with bias": PhiConfig(**SIZES),
    "granite": GraniteConfig(**GROUPED, logits_scaling=8.0),
    "cohere": CohereConfig(**GROUPED, logit_scale=0.25),
    "cohere2": Cohere2Config(**GROUPED, logit_scale=0.25),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    ),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def logits_and_hidden(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(0, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids).logits[0]
        return logits, model.base_model(input_ids).last_hidden_state[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_gives_the_models_own_logits(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    logits, hidden = logits_and_hidden(model)
    head = LanguageHead.from_model_folder(tmp_path, device="cpu", dtype=torch.float32)
    assert head.vocab_size == VOCAB
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)


def test_the_models_of_this_file_tell_their_features_apart() -> None:
    assert head_features(CONFIGS["granite"]).scale == 1 / 8
    assert head_features(CONFIGS["cohere"]).scale == 0.25
    assert head_features(CONFIGS["gemma3"]).softcap == 2.0
    assert head_features(CONFIGS["qwen2"]) == (1.0, None)


def test_sharded_files_and_bin_files_are_read(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama untied"])
    logits, hidden = logits_and_hidden(model)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("sharded", "bin"):
        head = LanguageHead.from_model_folder(tmp_path / folder, device="cpu", dtype=torch.float32)
        torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)


def test_rows_that_pad_the_vocabulary_are_cut_off(tmp_path: Path) -> None:
    model = random_model(CONFIGS["llama untied"])
    model.save_pretrained(tmp_path)
    logits, hidden = logits_and_hidden(model)
    tensors = load_file(tmp_path / "model.safetensors")
    padding = torch.full((31, 32), 9.0)
    tensors["lm_head.weight"] = torch.cat([tensors["lm_head.weight"], padding])
    save_file(tensors, tmp_path / "model.safetensors")
    head = LanguageHead.from_model_folder(tmp_path, device="cpu", dtype=torch.float32)
    torch.testing.assert_close(head.logits(hidden), logits, rtol=1e-5, atol=1e-5)


def test_half_precision_products_are_not_rounded_to_half_precision(tmp_path: Path) -> None:
    model = random_model(CONFIGS["qwen2"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    logits, hidden = logits_and_hidden(model)
    head = LanguageHead.from_model_folder(tmp_path, device="cpu", dtype=torch.bfloat16)
    weight = model.get_output_embeddings().weight.detach()
    exact = hidden.double() @ weight.double().T
    assert head.logits(hidden).dtype == torch.float32
    assert (head.logits(hidden) - exact).abs().max() < 1e-3 * (logits - exact).abs().max()


def test_a_saved_head_gives_the_same_logits_and_the_same_bytes(tmp_path: Path) -> None:
    for name in ("phi with bias", "gemma3"):
        model = random_model(CONFIGS[name]).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        head = LanguageHead.from_model_folder(tmp_path / name, device="cpu", dtype=torch.bfloat16)
        for copy in ("first", "second"):
            (tmp_path / name / copy).mkdir()
            head.save(tmp_path / name / copy)
        loaded = LanguageHead.load(tmp_path / name / "first", device="cpu")
        loaded.save(tmp_path / name / "second")
        files = sorted(path.name for path in (tmp_path / name / "first").iterdir())
        assert files == ["head.json", "head.safetensors"]
        for file in files:
            first, second = (tmp_path / name / c / file for c in ("first", "second"))
            assert first.read_bytes() == second.read_bytes()
        hidden = torch.randn(5, 32).bfloat16()
        assert torch.equal(loaded.logits(hidden), head.logits(hidden))


def test_a_chunk_of_positions_fits_the_budget(tiny_model_large_vocab: Path) -> None:
    head = LanguageHead.from_model_folder(tiny_model_large_vocab, device="cpu", dtype=torch.float32)
    budget = 10 << 20
    positions = head.positions_per_chunk(budget)
    block = head.logits(torch.randn(positions, 64))
    assert block.nbytes <= budget < block.nbytes + block[0].nbytes
    assert head.positions_per_chunk(1) == 1


def test_an_unknown_logit_setting_is_refused() -> None:
    config = LlamaConfig(**GROUPED)
    config.logit_temperature_per_layer = 0.7
    with pytest.raises(ConfigError, match=r"logit_temperature_per_layer = 0\.7"):
        head_features(config)
    config.logit_temperature_per_layer = None
    config.output_router_logits = True
    assert head_features(config) == (1.0, None)
    config.logit_scale = "inverse"
    with pytest.raises(ConfigError, match="logit_scale = 'inverse', expected a number"):
        head_features(config)


def test_folders_without_a_usable_head_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a transformers model folder"):
        LanguageHead.from_model_folder(tmp_path, device="cpu", dtype=torch.float32)
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no head matrix .* lm_head\.weight"):
        LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)
    config.tie_word_embeddings, config.vocab_size = True, 600
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"\[512, 64\], expected .*600"):
        LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model\.safetensors"):
        LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model-00001-of-00002\.safetensors is missing"):
        LanguageHead.from_model_folder(folder, device="cpu", dtype=torch.float32)


def test_a_damaged_saved_head_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    LanguageHead.from_model_folder(tiny_model, device="cpu", dtype=torch.float32).save(tmp_path)
    tensors = tmp_path / "head.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-7])
    with pytest.raises(StoreError, match="cannot read the language-model head"):
        LanguageHead.load(tmp_path, device="cpu")
    tensors.unlink()
    with pytest.raises(StoreError, match="cannot read the language-model head"):
        LanguageHead.load(tmp_path, device="cpu")
