"""The paper's tables at full size, one command each, for a rented GPU; and PEFT's MetaMathQA board.

    python -m benchmarks.paper gemma-2b-metamathqa --work RUNS      also llama-3-8b-metamathqa, gemma-2b-commonsense
    python -m benchmarks.paper peft-board --work RUNS --peft CLONE
    python -m benchmarks.paper TABLE --work RUNS --check            says what it would take, and begins nothing
    python -m benchmarks.paper TABLE --work RUNS --miniature        the same from end to end in minutes, on small models

Before anything is trained, the layers of the real model are timed on this device with random weights, and `pica plan` says
what memory and disk the rows take: what does not fit is said and nothing begins. The same command goes on where another one
was stopped, with `pica compare` underneath (a row's cells, its rates, its seeds), and writes a page with the paper's numbers
beside.
"""
