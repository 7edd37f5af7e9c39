"""HTTP as OpenAI's clients speak it, with vLLM's extension fields. Needs the extra ``serve``."""
