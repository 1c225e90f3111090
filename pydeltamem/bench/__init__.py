"""What an adapter costs, in time and bytes: `deltamem bench`, and what is fastest: `deltamem tune`.

comparison     a model with and without its adapter, and over another llama library
runs           timed prompts and single tokens in one context; worker: the same in a process of its own
pairs          sides in turn, the ratios of their times and the interval
nodes          --nodes: the time of a graph, node by node
operator       --op: the operator alone; ggml_graph: the graphs of it; floor: the least time of any kernel
instructions   instructions that a thread spends
ram            what a process takes of it
returning      --return: how soon a conversation goes on after a break
models         --synthetic: random models in the cache; synthetic: how they are written
tune           the search of `deltamem tune`
"""
