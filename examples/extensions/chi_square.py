"""Pearson's chi-square as an objective of one's own: named in a recipe as "chi_square:chi_square"."""

from hpd import Objective


def chi_square(cut: float = 20.0) -> Objective:
    r"""D = sum_v (p_v - q_v)^2 / q_v, an f-divergence with f(r) = (r - 1)^2.

    Args:
        cut: largest log-ratio log(p/q) that counts, so that exp does not overflow; nats.
    """

    def weights(teacher_logprobs, student_logprobs):
        # -q dD/dq = q (r^2 - 1) with r = p/q.
        ratio = (teacher_logprobs - student_logprobs).clamp(max=cut).exp()
        return student_logprobs.exp() * (ratio**2 - 1)

    def value(teacher_logprobs, student_logprobs):
        ratio = (teacher_logprobs - student_logprobs).clamp(max=cut).exp()
        return student_logprobs.exp() * (ratio - 1) ** 2

    return Objective(weights, value)
