"""What `chat` and `bench serve` need of a server that speaks OpenAI's API. Loads no torch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from typing import Any

import httpx

from moesaic.errors import ConfigError, ServingError


def client_of(
    url: str, key: str | None, *, timeout_seconds: float, connections: int | None = None
) -> httpx.AsyncClient:
    """A client for the server at `url`, with or without `/v1` at its end.

    Raises:
        ConfigError: That is no address.
    """
    base = url.rstrip("/").removesuffix("/v1") + "/v1/"
    key = key or os.environ.get("OPENAI_API_KEY")
    try:
        return httpx.AsyncClient(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_seconds),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,
        )
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"{url!r} is no address of a server: {error}.") from error


async def first_model(client: httpx.AsyncClient) -> str:
    """The name of the first model that a server lists.

    Raises:
        ServingError: It cannot be reached, or lists none.
    """
    try:
        response = await client.get("models")
    except httpx.HTTPError as error:
        raise ServingError(
            f"{client.base_url} cannot be reached: {str(error) or type(error).__name__}."
        ) from error
    if response.status_code != 200:
        raise ServingError(f"{client.base_url} answers {response.status_code}: {fault(response)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServingError(f"{client.base_url} lists no model. Give its name.") from error


async def stream(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer.

    Raises:
        ServingError: The server refuses, breaks off, or says that it failed.
    """
    ended = False
    try:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                raise ServingError(f"The server answers {response.status_code}: {fault(response)}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise ServingError(f"The server failed: {chunk['error'].get('message')}")
                    yield chunk
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ServingError(f"The connection to the server broke: {reason}.") from error
    if not ended:
        raise ServingError("The server broke off before the end of its answer.")


def fault(response: httpx.Response) -> str:
    """What a server says is wrong, in its own words."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200] or "no reason given"
