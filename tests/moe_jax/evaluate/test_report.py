import json
import math

from moe_jax.evaluate.accuracy import Accuracy
from moe_jax.evaluate.perplexity import Perplexity
from moe_jax.evaluate.questions import Answers
from moe_jax.evaluate.report import answer_rows, as_json, as_markdown, drift_row, perplexity_row

ANSWERS = Answers(
    "cross_chunk",
    {"2 chunks": Accuracy(3, 4), "3 chunks": Accuracy(1, 4)},
    (True, True, True, False, True, False, False, False),
)


def test_a_task_has_a_line_and_each_of_its_groups():
    rows = [perplexity_row(Perplexity(math.log(8), 0.01, 1000, 100)), *answer_rows(ANSWERS)]
    rows.append(drift_row(0.0123456, 2046))
    assert as_markdown(rows).splitlines() == [
        "| task | | result | 95 % interval | of |",
        "| --- | --- | --- | --- | --- |",
        "| perplexity | all | 8 | 7.843 to 8.16 | 1000 tokens |",
        "| cross_chunk | all | 50.0% | 21.5% to 78.5% | 8 questions |",
        "| cross_chunk | 2 chunks | 75.0% | 30.1% to 95.4% | 4 questions |",
        "| cross_chunk | 3 chunks | 25.0% | 4.6% to 69.9% | 4 questions |",
        "| drift | all | 0.01235 | unknown | 2046 tokens |",
    ]


def test_one_group_needs_no_line_of_its_own():
    one = Answers("recall", {"32 pairs": Accuracy(1, 1)}, (True,))
    (row,) = answer_rows(one, "other")
    assert (row.task, row.group, row.value, row.count) == ("other", "all", 1.0, 1)


def test_json_holds_the_rows_and_what_is_said_about_them():
    made = json.loads(json.dumps(as_json(answer_rows(ANSWERS), seed=3)))
    assert made["seed"] == 3 and len(made["results"]) == 3
    (alone,) = as_json([perplexity_row(Perplexity(0.0, math.nan, 9, 1))])["results"]
    assert alone["value"] == 1 and alone["low"] is None and alone["high"] is None
    assert made["results"][1]["group"] == "2 chunks" and made["results"][1]["value"] == 0.75
