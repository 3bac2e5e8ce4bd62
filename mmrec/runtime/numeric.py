"""Small helpers for whole numbers."""


def cdiv(a: int, b: int) -> int:
    """Ceiling division: the smallest whole number that is at least ``a / b``, for ``b`` > 0."""
    return -(-a // b)
