"""How good a model is: text it has not seen, tasks that need the context, what a change costs."""

from moe_jax.evaluate.accuracy import Accuracy as Accuracy
from moe_jax.evaluate.compare import Bar as Bar
from moe_jax.evaluate.compare import Comparison as Comparison
from moe_jax.evaluate.compare import compare as compare
from moe_jax.evaluate.data import Question as Question
from moe_jax.evaluate.held_out import held_out_texts as held_out_texts
from moe_jax.evaluate.perplexity import Perplexity as Perplexity
from moe_jax.evaluate.perplexity import perplexity as perplexity
from moe_jax.evaluate.questions import Answers as Answers
from moe_jax.evaluate.questions import QuestionSet as QuestionSet
from moe_jax.evaluate.questions import answer as answer
from moe_jax.evaluate.questions import make_questions as make_questions
