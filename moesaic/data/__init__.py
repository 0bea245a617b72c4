"""Text to token folder, and the order in which a run reads it.

`sources` reads documents, `chat` renders conversations, `prepare` tokenises and writes,
`tokenfolder` reads what was written, `batches` says which rows make up a step.
"""
