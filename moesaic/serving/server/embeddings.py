"""POST /v1/embeddings: a text as a vector, from the model's last hidden states.

Of length 1, as OpenAI's are. The models that Moesaic makes are trained to go on with a text and
not to compare texts, so this is as good as a language model's states are, and no better.
"""

from __future__ import annotations

import asyncio
import base64

import numpy as np
from starlette.requests import Request as HttpRequest

from moesaic.serving.config import RequestConfig
from moesaic.serving.server.completions import encode_prompts
from moesaic.serving.server.faults import ApiFault
from moesaic.serving.server.protocol import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from moesaic.serving.server.work import Service, Work, collected


async def create_embedding(
    service: Service, http: HttpRequest, body: EmbeddingRequest
) -> EmbeddingList | None:
    """Embed texts; None to a client that has gone."""
    service.check_model(body.model)
    http.state.facts["user"] = body.user
    prompts = await asyncio.to_thread(encode_prompts, service.engine.tokenizer, body.input)
    if not all(prompts):
        raise ApiFault(400, "An input is empty.", param="input", code="empty_prompt")
    service.room(max(len(prompt) for prompt in prompts), 0, default=None)
    pooling = body.pooling or "mean"
    work = Work(service, http)
    await work.begin(prompts, RequestConfig(embedding=pooling, max_new_tokens=0))

    async def whole() -> EmbeddingList:
        vectors = {}
        async for events in work.events():
            for number, event in events:
                if event.embedding_D is not None:
                    vectors[number] = np.asarray(event.embedding_D, dtype="<f4")
        listed = [
            Embedding(index=number, embedding=_encoded(vectors[number], body.encoding_format))
            for number in range(len(prompts))
        ]
        tokens = work.usage().prompt_tokens
        return EmbeddingList(
            data=listed,
            model=service.name,
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
            pooling=pooling,
        )

    return await collected(http, work, whole())


def _encoded(vector: np.ndarray, form: str | None) -> list[float] | str:
    length = float(np.linalg.norm(vector.astype("f8")))
    vector = (vector / length).astype("<f4") if length > 0 else vector
    if form == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    return [float(value) for value in vector]
