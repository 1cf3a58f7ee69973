"""What each stage does, and which settings name steps and models; written by ``make stages``."""

KINDS = {
    "ingest": "source",
    "episodes": "source",
    "demonstrations": "table",
    "preference_pairs": "source",
    "teacher_logits": "table",
    "subset_preferences": "table",
    "candidate_scores": "table",
    "student_responses": "table",
    "response_logprobs": "table",
    "advantages": "table",
    "teacher_align": "checkpoint",
    "student_init": "checkpoint",
    "distiller_init": "checkpoint",
    "train": "checkpoint",
    "evaluate": "report",
    "evaluate_preferences": "report",
}
REFERENCES = (
    "input",
    "model",
    "sampler",
    "reference",
    "data",
    "reader",
    "lm_data",
    "student",
    "students",
    "baseline",
    "judge",
)
