"""Finds text that two sets of documents share; written without the code that it checks."""


def longest_shared_passage(held, train, least=200):
    """The longest passage of ``least`` bytes or more that stands in a document of both; b'' where none does.

    A passage of ``least`` bytes in a training document covers one of its blocks of ``least // 2`` bytes that
    begin at multiples of ``least // 2``; each such block that stands anywhere in a held-out document is
    grown to both sides as far as the two agree.
    """
    block = least // 2
    places = {}
    for d, text in enumerate(held):
        for i in range(len(text) - block + 1):
            places.setdefault(hash(text[i : i + block]), []).append((d, i))
    longest = b""
    for text in train:
        for j in range(0, len(text) - block + 1, block):
            for d, i in places.get(hash(text[j : j + block]), ()):
                passage = _grow(held[d], i, text, j)
                if len(passage) >= max(least, len(longest) + 1):
                    longest = passage
    return longest


def _grow(a, i, b, j):
    before = 0
    while before < min(i, j) and a[i - before - 1] == b[j - before - 1]:
        before += 1
    after = 0
    while after < min(len(a) - i, len(b) - j) and a[i + after] == b[j + after]:
        after += 1
    return a[i - before : i + after]
