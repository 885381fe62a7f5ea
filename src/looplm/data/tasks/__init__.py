"""The tasks: one module each with `NAME`, `sample` and `sample_harder`. `REASONING` is the suite of spec
reasoning_tasks; `cot_format`, its eighth score, is a property of the other seven's completions."""

from looplm.data.tasks import arithmetic, comparison, even_odd, pattern, sorting, two_step, word_problem
from looplm.data.tasks.example import Task

REASONING: dict[str, Task] = {
    task.NAME: task for task in (arithmetic, two_step, even_odd, comparison, pattern, word_problem, sorting)
}
