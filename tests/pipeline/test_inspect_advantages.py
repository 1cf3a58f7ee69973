"""What ``inspect`` shows of advantages that were drawn with one threshold of the table."""

import numpy as np
from rich.console import Console

from pipeline.cache.pair_views import advantages_table
from schemas.tables.prompted.advantages import TauAdvantages


def test_values_of_drawn_tokens_stand_beside_the_rest() -> None:
    row = TauAdvantages(
        sample_id="a" * 24,
        num_entries_P=np.array([2, 0], np.uint8),
        id_gaps_low_E=np.array([4, 8], np.uint8),
        id_gaps_high_E=np.array([0, 2], np.uint8),
        value_codes_E=np.array([2 * 54, 2 * 57 + 1], np.uint8),
        rest_advantages_P=np.array([0.5, -0.25], np.float16),
        token_advantages_P=np.array([0.125, -1.0], np.float16),
        teacher_logprobs_N=np.array([-3.0], np.float32),
        reference_logprobs_N=np.array([-4.0], np.float32),
    )
    line, view = advantages_table(row, positions=2, top=1, decode=lambda ids: f"t{ids[0]}")
    assert line == "log p in nats: response 0: aligned -3.000, reference -4.000"
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as shown:
        console.print(view)
    said = shown.get()
    assert "(A - rest) / chance" in said
    assert "rest +0.500  't524' -2.000" in said and "'t4'" not in said  # the largest alone
    assert "rest -0.250" in said and "-1.000" in said
