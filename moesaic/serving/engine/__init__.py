"""Answer many requests at once: who is next, where their cache lies, which token, which text."""
