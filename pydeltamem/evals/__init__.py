"""What a memory recalls. Two evaluations stand side by side.

`deltamem eval recall`: a conversation is told, its text goes, and short questions follow.

    recall         the questions, task by task; case: one of them
    world          a small world of facts, drawn at random; world_phrases: its words
    words          facts of one word that nobody can guess
    corpora        conversations of people; questions: what they are asked
    stories        what `deltamem demo` tells
    methods        what a model has when it is asked; reader: the model, which reads and answers
    scoring        whether an answer is right
    statistics     how often each method is right, and what a memory gains
    report         tables and JSON; plot: a picture

`deltamem eval locomo` and others: the benchmarks of the publication.

    benchmarks     their names
    locomo, hotpotqa, ifeval, gpqa, qa, memory_agent_bench    a benchmark each: its file, prompt and score
    items          questions, contexts and the files that they are read from
    run            asks by every method; views: what is seen of a context; asker: the model, which answers
    answer_file    the JSON lines of a run, which goes on where it stopped
    metrics        scores as the field computes them
    results        joins runs; tables, JSON and a picture

Both:

    search         which texts BM25 finds
    bootstrap      means, ratios and their intervals

Beside them:

    harness        lm-evaluation-harness with our models
    sampling       the temperature first, as in transformers and vLLM
"""
