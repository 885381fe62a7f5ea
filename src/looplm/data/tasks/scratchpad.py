"""Written arithmetic, digit by digit: the steps that arithmetic, two_step, word_problem and pattern share.

Every function returns its steps and its value. Operands are first written at equal width, so that matching digits stand
a fixed distance apart: what a small attention layer finds without counting. No step holds "<".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Steps and the value they arrive at. The last step is always `={value}`."""

    steps: tuple[str, ...]
    value: int


def compute(left: int, op: str, right: int) -> Work:
    """Work out `left op right` for any integers and op in + - *, by way of magnitudes."""
    if left >= 0 and right >= 0:
        return {"+": add, "-": subtract, "*": multiply}[op](left, right)
    written = f"{left}{op}{right}="
    if op == "*":
        sign = "-" if (left < 0) != (right < 0) else ""
        inner = multiply(abs(left), abs(right))
        return _signed(f"{written}{sign}({abs(left)}*{abs(right)})", inner, negative=bool(sign))
    addend = right if op == "+" else -right
    if left < 0 and addend < 0:
        inner = add(-left, -addend)
        return _signed(f"{written}-({-left}+{-addend})", inner, negative=True)
    if left < 0:
        first, second = addend, -left
        inner = subtract(first, second)
    else:
        first, second = left, abs(addend)
        inner = subtract(first, second) if addend < 0 else add(first, second)
    sign = "+" if left >= 0 and addend >= 0 else "-"
    return _signed(f"{written}{first}{sign}{second}", inner, negative=False)


def add(left: int, right: int) -> Work:
    """Columns from the right with carries: `47+85`, `7+5=12`, `4+8+1=13`, `=132`."""
    a, b = align(left, right)
    steps = [f"{a}+{b}"]
    carry = 0
    for x, y in zip(reversed(a), reversed(b), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}" if carry else f"{x}+{y}={total}")
        carry = total // 10
    return _finish(steps, left + right)


def subtract(left: int, right: int) -> Work:
    """Compare first, swap the operands if the left one is smaller, then go through the columns from the right with
    borrows. A column that was borrowed from first gives its one away, `6-1=5`, and may then borrow itself, `15-8=7`.

    Columns that the comparison found equal give zeros and no borrow reaches them, so they are left out.
    """
    a, b = align(left, right)
    steps = [f"{a}-{b}", compare(a, b)]
    if left < right:
        a, b = b, a
        steps.append(f"{a}-{b}")
    n_equal = steps[1].count("=")
    borrow = 0
    for x, y in zip(reversed(a[n_equal:]), reversed(b[n_equal:]), strict=True):
        top = int(x)
        if borrow:  # as a separate step, so that the remainder is compared with y in writing
            top = top or 10
            steps.append(f"{top}-1={top - 1}")
            top -= 1
        borrow = int(int(x) - borrow < int(y))
        top += 10 if top < int(y) else 0
        steps.append(f"{top}-{y}={top - int(y)}")
    return _finish(steps, left - right)


def multiply(left: int, right: int) -> Work:
    """One row per digit of the shorter factor, then the rows added up with their shifts. The carry is added as a
    separate step, `9*8=72`, `72+7=79`: few products meet a carry as rare as that 7, but every sum meets its digits."""
    a, b = (str(left), str(right)) if len(str(left)) >= len(str(right)) else (str(right), str(left))
    steps = [f"{a}*{b}"]
    total: int | None = None
    for shift, y in enumerate(reversed(b)):
        carry = 0
        for x in reversed(a):
            product = int(x) * int(y)
            steps.append(f"{x}*{y}={product}")
            if carry:
                steps.append(f"{product}+{carry}={product + carry}")
            carry = (product + carry) // 10
        row = int(a) * int(y)
        steps.append(f"={row}")
        if total is None:
            total = row
        else:
            summed = add(total, row * 10**shift)
            steps.extend(summed.steps)
            total = summed.value
    assert total is not None
    return Work(tuple(steps), total)


def align(left: int, right: int) -> tuple[str, str]:
    """Both numbers zero-padded to the width of the longer."""
    width = max(len(str(left)), len(str(right)))
    return f"{left:0{width}d}", f"{right:0{width}d}"


def compare(a: str, b: str) -> str:
    """How a stands to b, two digit strings of equal width: `=` for each equal leading digit, then the verdict."""
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return "=" * index + ("larger" if x > y else "smaller")
    return "=" * len(a)


def _finish(steps: list[str], value: int) -> Work:
    return Work((*steps, f"={value}"), value)


def _signed(first: str, inner: Work, *, negative: bool) -> Work:
    """`inner` behind the step that rewrote a signed operation into it."""
    value = -inner.value if negative else inner.value
    last = (f"={value}",) if negative else ()
    return Work((first, *inner.steps, *last), value)
