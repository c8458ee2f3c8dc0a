"""Guard for the check cell of an exercise."""

from typing import Any


def answered(**answers: Any) -> bool:
    """Whether all answers are given; prints those still missing (None or ...).

    >>> answered(share=None, layers=(3, 4))
    Still missing: share
    False
    >>> answered(share=0.5, layers=(3, 4))
    True
    """
    empty = [name for name, value in answers.items() if value is None or value is ...]
    if empty:
        print("Still missing:", ", ".join(empty))
    return not empty
