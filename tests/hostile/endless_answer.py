"""Answers with a list that contains itself."""


def solve(x):
    answer = []
    for _ in range(10**5):
        answer = [answer]
    answer.append(answer)
    return answer
