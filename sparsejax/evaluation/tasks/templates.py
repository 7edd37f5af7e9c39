"""The sentences of the tasks: one source for evaluation texts and for training data.

Every fact has the form ``X separator Y``: the thing that is asked for comes two words after the thing that is given.
Texts are written so that each word carries its leading space; sentences are simply concatenated.
"""

from __future__ import annotations

# Facts. Slots are filled by position; slot words come with their leading space.
NEEDLE = " The magic number for{0} is{1}."
CODE = " One code of{0} is{1}."
PAIR = "{0}:{1};"
RECORD = "{0}{1};"  # training only: the thing given and the thing asked for side by side
ASSIGN = " Copy{0} to{1}."
ASSIGN_TO_KEY = " Copy{1} to{0}."  # the same sentence with its slots in the order key, value

# Filler sentences: nouns, adjectives and verbs as they also appear in facts.
FILLERS = (
    " The{1}{0}{3}{4} the{2}.",
    " The{0}{3}{4} the{1}{2}.",
    " A{1}{0} is{4} the{2}.",
    " The{0} was{1} and{3}{4} a{2}.",
)
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# Questions and answers. The answer repeats what was asked for, then gives what was found.
ASK_NEEDLE = "\nQ: What is the magic number for{0}?\nA:"
ASK_PAIR = "\nQ: What is the value of{0}?\nA:"
ASK_CODES = "\nQ: What are all codes of{0}?\nA:"
ASK_CHAIN = "\nQ: Which items hold{0}?\nA:"
ASK_MANY = "\nQ: List the value of{0}.\nA:"
ASK_COMMON = "\nQ: What are the{0} most common words?\nA:"
ASK_FREQUENT = "\nQ: What are the{0} most frequent coded words?\nA:"
ASK_COPY = "\nQ: Copy the list.\nA:"
NEXT = ","
END = "."
