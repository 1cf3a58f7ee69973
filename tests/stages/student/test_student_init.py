"""A student is the teacher's own layers, in an ordinary folder, the same bytes every time."""

import itertools
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from schemas.errors import ConfigError
from stages.models.checkpoints.token_bytes import ByteTokenizer
from stages.models.checkpoints.tokenizer_identity import (
    num_token_ids,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
)
from stages.student.init.stage import chosen_layers, evenly_spaced
from stages.student.init.work import init_student
from tests.fixtures.tokenizer_kinds import save_kind

LAYERS = 6
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
# eos_token_id is as long as the list of layers: it must not be cut with the per-layer lists
ENDS = list(range(1, LAYERS + 1))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=ENDS, tie_word_embeddings=False))


def qwen2() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=WINDOWS)
    )


def gemma3() -> Gemma3ForCausalLM:
    return Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=WINDOWS))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64)
    )


FAMILIES = {"llama": llama, "qwen2": qwen2, "gemma3": gemma3, "gpt2": gpt2}


def save_teacher(folder: Path, family: str = "llama") -> Path:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    for parameter in model.parameters():  # far from the identity, so that every layer tells
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


@pytest.mark.parametrize("family", FAMILIES)
def test_student_is_the_teacher_with_the_other_layers_skipped(family: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", family)
    info = init_student(folder, tmp_path / "student", [0, 1, 4])
    input_ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for index, layer in enumerate(model.get_decoder().get_submodule(_layers_name(model))):
        if index not in info.layers:
            layer.register_forward_hook(_returns_its_input)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    with torch.inference_mode():
        expected = model(input_ids, use_cache=False).logits
        torch.testing.assert_close(student(input_ids, use_cache=False).logits, expected)
    assert student.config.num_hidden_layers == 3
    assert info.num_parameters == student.num_parameters()


def _layers_name(model: torch.nn.Module) -> str:
    return "h" if isinstance(model, GPT2LMHeadModel) else "layers"


def _returns_its_input(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: object
) -> object:
    return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_per_layer_lists_are_cut_and_other_lists_are_not(family: str, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", family)
    init_student(folder, tmp_path / "student", [0, 3, 4])
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "student").config
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_eos_list_as_long_as_the_layers_survives(teacher: Path, tmp_path: Path) -> None:
    init_student(teacher, tmp_path / "student", 3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.eos_token_id == ENDS


def test_equal_bytes_twice_and_making_it_again_changes_nothing(
    teacher: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    init_student(teacher, first, 3)
    init_student(teacher, second, 3)
    init_student(teacher, second, 3)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_another_model_in_the_folder_is_never_replaced(teacher: Path, tmp_path: Path) -> None:
    init_student(teacher, tmp_path / "student", 3)
    before = (tmp_path / "student" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="already holds another model"):
        init_student(teacher, tmp_path / "student", 2)
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == before


def test_half_made_folder_is_finished(teacher: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    init_student(teacher, whole, 3)
    (half / ".partial-0").mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"torn")  # no config.json yet: it is moved last
    init_student(teacher, half, 3)
    assert sorted(p.name for p in half.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_tokenizer_and_chat_template_are_the_teachers(teacher: Path, tmp_path: Path) -> None:
    init_student(teacher, tmp_path / "student", 2)
    assert tokenizer_fingerprint(tmp_path / "student") == tokenizer_fingerprint(teacher)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_dtype_is_the_teachers_unless_given(teacher: Path, tmp_path: Path) -> None:
    assert init_student(teacher, tmp_path / "same", 2).dtype == "float32"
    info = init_student(teacher, tmp_path / "half", 2, dtype="bfloat16")
    assert info.dtype == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_even_spacing_keeps_both_ends_with_the_longer_steps_last() -> None:
    assert evenly_spaced(10, 30) == (0, 3, 6, 9, 12, 15, 18, 21, 25, 29)
    assert evenly_spaced(2, 7) == (0, 6)
    for num_layers in range(2, 40):
        assert evenly_spaced(num_layers, num_layers) == tuple(range(num_layers))
        for count in range(2, num_layers):
            kept = evenly_spaced(count, num_layers)
            steps = [b - a for a, b in itertools.pairwise(kept)]
            assert (kept[0], kept[-1], len(kept)) == (0, num_layers - 1, count)
            assert max(steps) - min(steps) <= 1 and steps == sorted(steps)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, r"got 7, expected 2 to 6"),
        (1, r"got 1, expected 2 to 6"),
        ([0, 6], r"got \[0, 6\], expected indices from 0 to 5"),
        ([-1, 2], r"expected indices from 0 to 5"),
        ([], r"expected indices from 0 to 5"),
        ([0, 2, 2], r"each index once and in rising order, such as \[0, 2\]"),
        ([3, 1], r"each index once and in rising order, such as \[1, 3\]"),
    ],
)
def test_layers_that_do_not_fit_are_refused_in_one_line(
    layers: int | list[int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        chosen_layers(layers, LAYERS)
    assert "\n" not in str(caught.value)


def test_folder_without_a_model_or_tokenizer_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        init_student(tmp_path, tmp_path / "student", 2)
    (teacher / "config.json").unlink()
    with pytest.raises(ConfigError, match="not a model folder"):
        init_student(teacher, tmp_path / "student", 2)
    with pytest.raises(ConfigError, match="expected one of float32"):
        init_student(teacher, tmp_path / "student", 2, dtype="int8")


@pytest.mark.parametrize("tie", [True, False])
def test_rows_for_another_tokenizer_are_the_teachers_own_or_means(
    tie: bool, tmp_path: Path
) -> None:
    """A token that both have keeps its embedding; half a character is the mean of its bytes."""
    folder = save_kind(tmp_path / "teacher", "byte_level", "PreTrainedTokenizerFast")
    other = save_kind(tmp_path / "other", "metaspace", "LlamaTokenizer")
    torch.manual_seed(0)
    num_tokens = num_token_ids(folder) or 0
    sizes = {**SIZES, "vocab_size": num_tokens + 3}  # rows that pad the teacher's matrix
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tie)).save_pretrained(folder)
    init_student(folder, tmp_path / "student", 2, tokenizer=other)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    one, two = ByteTokenizer(folder), ByteTokenizer(other)
    id_of = {part: index for index, part in one.bytes_of.items()}
    copied = mixed = 0
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old_VD = getattr(teacher, name)().weight
        new_VD = getattr(student, name)().weight
        assert len(new_VD) == 1 + max(*two.bytes_of, *two.special)
        for index, part in two.bytes_of.items():
            if part in id_of:
                torch.testing.assert_close(new_VD[index], old_VD[id_of[part]])
                copied += 1
                continue
            tokens, _ = one.encode(part)
            torch.testing.assert_close(new_VD[index], old_VD[tokens].mean(dim=0))
            mixed += 1
        for role in ("bos", "eos"):
            torch.testing.assert_close(new_VD[two.named[role]], old_VD[one.named[role]])
    assert copied > 256 and mixed > 10
    assert student.config.eos_token_id == two.named["eos"]
    assert vocabulary_fingerprint(tmp_path / "student") == vocabulary_fingerprint(other)
