"""A PEFT adapter on a base: merged once into an ordinary folder, named by content, or refused."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.planning.plan import make_plan
from pipeline.planning.recipe_file import load_recipe
from schemas.errors import ConfigError, EngineError
from stages.models.checkpoints.adapters import merged_folder, served_rank
from stages.models.checkpoints.tokenizer_identity import tokenizer_fingerprint
from stages.models.engines.engine import Engine, open_adapted_engine
from stages.models.engines.engine_pair import OneEngine, is_one_engine, open_engine_pair
from stages.models.engines.sequences import TokenIds
from stages.models.engines.transformers_engine import TransformersEngine
from stages.models.spec import EngineOptions, ModelSpec
from tests.fixtures.tiny_recipe import TinyRecipe, edit_recipe, make_recipe, teachercache


def save_adapter(base: Path, folder: Path, *, seed: int = 0, std: float = 0.2) -> Path:
    """An adapter with random weights in both factors, so that it changes every answer."""
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(str(folder))
    return folder


def merge(base: Path, adapter: Path, name: str) -> Path:
    return merged_folder(base, adapter, dtype="float32", name=name)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model, tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture
def recipe(tiny_model: Path, adapter: Path, paragraphs: list[str], tmp_path: Path) -> TinyRecipe:
    made = make_recipe(tmp_path, tiny_model, paragraphs[:12])
    edit_recipe(made, "models", "teacher", "adapter", value=str(adapter))
    return made


@pytest.mark.vllm
def test_one_vllm_engine_serves_base_and_adapter(
    tiny_model: Path, adapter: Path, own_cache: Path, tmp_path: Path
) -> None:
    """Hidden states are those of each alone (to 5e-4: other sums), and nothing is merged."""
    base, adapted = (
        ModelSpec(tiny_model, "float32", "vllm", 64, added, "unused") for added in (None, adapter)
    )
    assert is_one_engine((adapted, base)) and not is_one_engine((base, base))
    options = EngineOptions(cache_dir=tmp_path / "check", kv_cache_memory_bytes=64 << 20)
    sequences = [np.arange(5, 45), np.arange(5, 40), np.arange(100, 103)]

    def run(engine: Engine) -> list[torch.Tensor]:
        return engine.last_hidden_states(sequences, [4, 3, 2])

    with open_engine_pair((adapted, base), options=options) as pair:
        assert isinstance(pair, OneEngine)
        found = pair.each(run)
        again = pair.each(run)
        assert pair.heads()[0] is pair.heads()[1]
    assert not (own_cache / "merged").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = [states_of(model, ids_T) for ids_T in sequences]
    wanted = [
        states_of(PeftModel.from_pretrained(model, str(adapter)).base_model.model, ids_T)
        for ids_T in sequences
    ]
    for states, first, second in zip(found, again, (wanted, plain), strict=True):
        for here, repeated, there, count in zip(states, first, second, (4, 3, 2), strict=True):
            torch.testing.assert_close(here, there[-count:], rtol=0, atol=5e-4)
            assert torch.equal(here, repeated)
    assert float((wanted[0] - plain[0]).abs().max()) > 0.05


class Stand(TransformersEngine):
    """In vLLM's place: with the adapter it runs another folder, without it the base."""

    with_adapter: Path

    def __init__(self, model_path: Path, *, share_prefixes: bool, adapter: Path, **place: Any):
        super().__init__(model_path, **place)
        self.use_adapter = False
        self._adapted = TransformersEngine(self.with_adapter, **place)

    def hidden_states(self, sequences: Sequence[TokenIds]) -> Iterator[torch.Tensor]:
        plain = super().hidden_states(sequences)
        yield from self._adapted.hidden_states(sequences) if self.use_adapter else plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_an_engine_that_leaves_the_adapter_out_is_refused(
    dtype: str,
    tiny_model: Path,
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It moves log-probs by less than the check of the head allows in bfloat16."""
    adapter = save_adapter(tiny_model, tmp_path / "adapter", std=0.05)
    part = shutil.copytree(adapter, tmp_path / "part")
    tensors = load_file(adapter / "adapter_model.safetensors")
    halved = {n: t * 0 if "down_proj" in n or "layers.0" in n else t for n, t in tensors.items()}
    save_file(halved, part / "adapter_model.safetensors", metadata={"format": "pt"})
    whole, half = (
        merged_folder(tiny_model, one, dtype=dtype, name=f"{one.name}-{dtype}")
        for one in (adapter, part)
    )
    monkeypatch.setattr("stages.models.engines.engine.VllmEngine", Stand)
    options = EngineOptions(device="cpu", cache_dir=tmp_path / "check")

    def opened(folder: Path) -> None:
        monkeypatch.setattr(Stand, "with_adapter", folder, raising=False)
        with open_adapted_engine(tiny_model, adapter, dtype=dtype, options=options) as engine:
            assert not engine.use_adapter

    opened(whole)
    expected = f"{re.escape(str(adapter))}: the engine shows "
    if dtype == "float32":  # the check of the head sees it first
        expected = "the engine's log-probs differ"
    with pytest.raises(EngineError, match=expected):
        opened(tiny_model)
    with pytest.raises(EngineError, match=expected):
        opened(half)


def test_an_adapter_that_does_nothing_yet_is_served(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter", std=0.0)
    monkeypatch.setattr("stages.models.engines.engine.VllmEngine", Stand)
    monkeypatch.setattr(Stand, "with_adapter", tiny_model, raising=False)
    options = EngineOptions(device="cpu", cache_dir=tmp_path / "check")
    with open_adapted_engine(tiny_model, adapter, dtype="float32", options=options):
        pass


def states_of(model: Any, ids_T: Any) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model.model(input_ids=torch.tensor(ids_T)[None]).last_hidden_state
    return hidden[0]


def test_adapters_that_vllm_cannot_serve_are_merged(adapter: Path, tmp_path: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    cases: list[tuple[dict[str, Any], int | None]] = [
        ({}, 8),
        ({"r": 20}, 32),
        ({"rank_pattern": {"q_proj": 65}}, 128),
        ({"r": 1000}, None),
        ({"peft_type": "IA3"}, None),
        ({"use_dora": True}, None),
        ({"bias": "all"}, None),
        ({"lora_bias": True}, None),
        ({"layer_replication": [[0, 1], [0, 2]]}, None),
        ({"init_lora_weights": "pissa"}, None),
        ({"init_lora_weights": "gaussian"}, 8),
        ({"modules_to_save": ["lm_head"]}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, None),
        ({"target_modules": "all-linear"}, None),
    ]
    for changes, rank in cases:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        assert served_rank(tmp_path) == rank, changes


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(5, 45)[None]).logits
    return found


def test_the_merged_folder_answers_as_the_adapted_model(
    tiny_model: Path, adapter: Path, own_cache: Path
) -> None:
    folder = merge(tiny_model, adapter, "one")
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits_of(base)
    wanted = logits_of(PeftModel.from_pretrained(base, str(adapter)))
    found = logits_of(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float((wanted - before).abs().max()) > 0.05
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(tiny_model)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert merge(tiny_model, adapter, "one") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert modes == {(folder / "config.json").stat().st_mode}  # not the weights' owner alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_in_float32_whatever_the_base_is_stored_in(
    tiny_model: Path, tmp_path: Path, own_cache: Path, dtype: str
) -> None:
    """Against base + scale * B A in float64, rounded once to the dtype of the recipe."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    adapter = save_adapter(base, tmp_path / "adapter", std=0.01)
    folder = ModelSpec(base, dtype, "transformers", 64, adapter, f"merged-{dtype}").path
    weights, merged = (load_file(each / "model.safetensors") for each in (base, folder))
    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    changed = 0
    for name, found in merged.items():
        wanted = weights[name].double()
        part = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{part}.lora_A.weight" in factors:
            low_rank = (factors[f"{part}.lora_{half}.weight"].double() for half in "BA")
            wanted = wanted + config["lora_alpha"] / config["r"] * torch.matmul(*low_rank)
            changed += 1
        assert found.dtype == getattr(torch, dtype)
        if dtype == "bfloat16":  # a sum next to the middle of two may be rounded either way
            assert (found != wanted.to(found.dtype)).float().mean() < 1e-3
        else:
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-7)
    assert changed == 4


def test_an_adapter_is_part_of_the_name_and_where_it_lies_is_not(
    recipe: TinyRecipe, tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    def signals() -> str:
        return recipe.step("signals").fingerprint

    first = signals()
    copy = shutil.copytree(adapter, tmp_path / "copy")
    body = json.loads((copy / "adapter_config.json").read_text())
    body["base_model_name_or_path"] = "elsewhere"
    (copy / "adapter_config.json").write_text(json.dumps(body))
    edit_recipe(recipe, "models", "teacher", "adapter", value=str(copy))
    assert signals() == first
    other = save_adapter(tiny_model, tmp_path / "other", seed=1)
    edit_recipe(recipe, "models", "teacher", "adapter", value=str(other))
    assert signals() != first
    edit_recipe(recipe, "models", "teacher", "adapter", value=None)
    assert signals() != first


def test_planning_loads_no_torch_and_merges_nothing(recipe: TinyRecipe, own_cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.planning.plan import make_plan;"
        "from pipeline.planning.recipe_file import load_recipe;"
        "make_plan(load_recipe(Path(sys.argv[1])));"
        "print([n for n in sys.modules if n in ('torch', 'peft', 'transformers')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe.path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert not (own_cache / "merged").exists()


@pytest.mark.slow
def test_a_recipe_runs_with_an_adapted_teacher(recipe: TinyRecipe, own_cache: Path) -> None:
    """Its rows are those of the merged folder given as a plain model, under another name."""
    said = teachercache("run", recipe.path)
    assert said.code == 0, said.err
    adapted = recipe.step("signals")
    merged = adapted.models["teacher"].folder
    edit_recipe(recipe, "models", "teacher", value={"path": str(merged), "dtype": "float32"})
    edit_recipe(recipe, "models", "teacher", "engine", value="transformers")
    assert teachercache("run", recipe.path).code == 0
    plain = recipe.step("signals")
    names = [path.name for path in sorted(plain.folder.glob("shard-*.arrow"))]
    assert names and plain.fingerprint != adapted.fingerprint
    for name in names:
        assert (plain.folder / name).read_bytes() == (adapted.folder / name).read_bytes()


def test_what_is_no_adapter_of_the_model_is_one_line(
    recipe: TinyRecipe, tiny_model: Path, adapter: Path, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / "empty").mkdir()
    edit_recipe(recipe, "models", "teacher", "adapter", value=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"empty is not a PEFT adapter: expected adapter_config"):
        make_plan(load_recipe(recipe.path))
    other = shutil.copytree(adapter, tmp_path / "other")
    body = json.loads((other / "adapter_config.json").read_text())
    body["r"] = 3
    (other / "adapter_config.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="does not fit the model"):
        merge(tiny_model, other, "two")
    body |= {"r": 2, "target_modules": ["nowhere"]}
    (other / "adapter_config.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="does not fit the model"):
        merge(tiny_model, other, "three")
    for broken, reason in ((other, "does not fit the model"), (tmp_path / "base", "cannot load")):
        shutil.copytree(adapter if broken == other else tiny_model, broken, dirs_exist_ok=True)
        weights = next(broken.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(ConfigError, match=reason):
            merge(tiny_model if broken == other else broken, other, "four")
    tensors = load_file(adapter / "adapter_model.safetensors")
    nans = {name: tensor * float("nan") for name, tensor in tensors.items()}
    save_file(nans, other / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"other cannot be merged into .*NaNs"):
        merge(tiny_model, other, "five")
    assert not list((own_cache / "merged").iterdir())
    edit_recipe(recipe, "models", "teacher", value={"step": "x", "adapter": "y"})
    with pytest.raises(ConfigError, match="'adapter' goes with 'path'"):
        load_recipe(recipe.path)
