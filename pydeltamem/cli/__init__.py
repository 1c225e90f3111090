"""The command `deltamem`: one module a subcommand, which main.py lists, and what these share.

parser         the parser, and types of arguments
model_options  options of the commands that run a model
prompt         messages that are typed or piped
progress       bars; picture: a state as a heat map; bench_tables: the tables of `deltamem bench`
"""
