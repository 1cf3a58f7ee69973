"""Free answers against a slow greedy loop of plain forwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from schemas.errors import ConfigError
from schemas.tables.episodes import Episode
from stages.models.causal_lm.model import load_student
from stages.student.evaluate.free_answers import SPARE_TOKENS, FreeAnswer, generate_answers
from stages.student.evaluate.icl_tasks import generation_numbers
from tests.fixtures.answered_episodes import Parts, make_episodes, save_student

Free = list[tuple[Episode, Parts]]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("generation") / "student", tiny_model)


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return load_student(folder, device=torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def free(tiny_model: Path) -> Free:
    made = make_episodes(AutoTokenizer.from_pretrained(tiny_model))
    return [(episode, parts) for episode, parts in made if episode.kind == "generation"]


def row_of(episode: Episode) -> dict[str, Any]:
    return {
        "input_ids_T": episode.input_ids_T,
        "answer_start": episode.answer_start,
        "draw": episode.draw,
    }


def answers_of(model: PreTrainedModel, free: Free, folder: Path, size: int) -> list[FreeAnswer]:
    rows = [row_of(episode) for episode, _ in free]
    with torch.inference_mode():
        return generate_answers(model, rows, tokenizer_folder=folder, batch_size=size)


def slow_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(model(input_ids=torch.tensor([prompt + new])).logits[0, -1].argmax())
            if token == 0:
                break
            new.append(token)
    return new


def test_free_answers_are_those_of_a_slow_loop(
    model: PreTrainedModel, free: Free, folder: Path
) -> None:
    """Prompts of several lengths in one batch; what the model folder suggests is not applied."""
    own = model.generation_config
    assert own is not None
    own.repetition_penalty, own.do_sample, own.temperature = 3.0, True, 9.0
    said = answers_of(model, free, folder, 3)
    assert said == answers_of(model, free, folder, 1)
    assert model.generation_config is own
    assert len({len(parts.prompt()) for _, parts in free}) > 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for (_, parts), answer in zip(free, said, strict=True):
        longest = len(parts.answer) + SPARE_TOKENS
        text = tokenizer.decode(slow_greedy(model, parts.prompt(), longest))
        assert answer.predicted == text.strip().split("\n")[0].strip()
        assert answer.gold == tokenizer.decode(parts.answer).strip()
    assert len({answer.predicted for answer in said}) > 1


def test_an_answer_ends_with_the_text_and_with_the_line(
    model: PreTrainedModel, folder: Path
) -> None:
    """A head that says the same tokens over and over: all of its answer is known."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (line_end,) = tokenizer.encode("\n")
    (the,) = tokenizer.encode(" the")
    rows = [{"input_ids_T": np.array([300, 301, the, the]), "answer_start": 2}]
    cases = {
        (0,): "",
        (the,): " ".join(["the"] * (2 + SPARE_TOKENS)),
        (the, the, 0): "the the",
        (line_end, the, line_end, 301): "the",
        (line_end,): "",
    }
    for tokens, expected in cases.items():
        handle = model.get_output_embeddings().register_forward_hook(Parrot(list(tokens)))
        with torch.inference_mode():
            (answer,) = generate_answers(model, rows, tokenizer_folder=folder, batch_size=8)
        handle.remove()
        assert (answer.gold, answer.predicted) == ("the the", expected)


def test_an_answer_ends_with_the_turn_of_the_chat_template(
    model: PreTrainedModel, folder: Path, tmp_path: Path
) -> None:
    """By a token that is neither the end of text nor marked as special."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|stop|>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    (the,), stop = tokenizer.encode(" the"), tokenizer.convert_tokens_to_ids("<|stop|>")
    rows = [{"input_ids_T": np.array([300, 301, the]), "answer_start": 2}]
    turns = "{% for m in messages %}{{ m.content + '<|stop|>\n' }}{% endfor %}"
    for template, expected in ((turns, "the"), ("{{ raise_exception('no') }}", "the<|stop|>")):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path)
        said = Parrot([the, stop, *[0] * SPARE_TOKENS])
        handle = model.get_output_embeddings().register_forward_hook(said)
        with torch.inference_mode():
            (answer,) = generate_answers(model, rows, tokenizer_folder=tmp_path, batch_size=8)
        handle.remove()
        assert answer.predicted == expected


class Parrot:
    """Says its tokens in turn, whatever the model computes."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.said = 0

    def __call__(self, module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        token = self.tokens[self.said % len(self.tokens)]
        self.said += 1
        ids = torch.full(logits.shape[:-1], token)
        return torch.nn.functional.one_hot(ids, logits.shape[-1]).float()


def test_a_prompt_that_fills_the_context_still_gets_an_answer(
    model: PreTrainedModel, folder: Path
) -> None:
    ids_T = np.resize(np.arange(20, 400), 256)  # max_position_embeddings
    rows = [{"input_ids_T": ids_T, "answer_start": 254}]
    handle = model.get_output_embeddings().register_forward_hook(Parrot([262]))
    with torch.inference_mode():
        (answer,) = generate_answers(model, rows, tokenizer_folder=folder, batch_size=8)
    handle.remove()
    assert answer.predicted == "the the"  # two tokens of room, not 2 + SPARE_TOKENS


def test_exact_match_and_f1_over_draws(free: Free) -> None:
    draws = zip(free[:4], (0, 0, 1, 1), strict=True)
    rows = [row_of(episode) | {"draw": draw} for (episode, _), draw in draws]
    answers = [FreeAnswer(*pair) for pair in (("a b", "B"), ("x", "y"), ("x", "the x"), ("x", "x"))]
    numbers = generation_numbers(rows, answers)
    assert numbers["exact_match"] == pytest.approx((1 / 2 + 1) / 2)
    assert numbers["exact_match_deviation"] == pytest.approx(0.5**1.5)
    assert numbers["token_f1"] == pytest.approx((1 / 2 + 1) / 2)
    assert numbers["majority_exact_match"] == 3 / 4


def test_a_folder_without_a_tokenizer_is_one_line(
    model: PreTrainedModel, free: Free, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot load the tokenizer of"):
        answers_of(model, free, tmp_path, 8)
