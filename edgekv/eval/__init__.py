"""What compression costs: evaluations on the shipped runtime, with baselines and uncertainty beside them.

    setting.py      what is compared
    haystack.py     texts to hide needles in
    tasks.py        documents with needles, and the questions about them
    needles.py      runs them: a document is read once, every setting evicts from a copy of its cache and is asked
    perplexity.py   loss along a text in a bounded cache
    divergence.py   KL divergence and top-1 agreement with the full cache
    recall.py       how much of the attention eviction and selection hold, against the best choice
    journal.py      what was found so far, on disk: an evaluation goes on where it was stopped
    stats.py        confidence intervals and paired tests
    report.py       tables; pictures are in edgekv/plot.py
"""
