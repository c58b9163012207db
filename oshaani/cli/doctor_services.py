"""What `oshaani doctor` asks of services: the running server, the models, what tools need."""

from __future__ import annotations

from collections.abc import Sequence

from domain.ports import ModelCard
from oshaani.cli.findings import Finding, fail, ok, warn
from oshaani.cli.http import NotOshaani, api_at
from oshaani.cli.serve import FREE_CALLS, is_given_away
from oshaani.cli.trouble import Failed
from oshaani.models import model_registry
from oshaani.settings import Settings
from oshaani.shapes import bracketed

READY_S = 6.0
NAMED_MAX = 4  # models listed of one provider
WEB_PORTS = frozenset({80, 443})
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where such a server is reached


async def server(settings: Settings) -> list[Finding]:
    """Whether a server of these settings runs, and can serve."""
    url = f"http://{bracketed(_ANY_ADDRESS.get(settings.host, settings.host))}:{settings.port}"
    try:
        async with api_at(url, READY_S) as api:
            status, body = await api.exchange("GET", "/readyz", None, None)
            checks = body.get("checks")
            if not isinstance(checks, list):
                raise NotOshaani
    except NotOshaani:
        fix = "stop that, or set OSHAANI_PORT to another port"
        return [fail("server", f"something else answers at {url}", fix)]
    except Failed:
        return [warn("server", f"none answers at {url}", "start it: `oshaani up`")]
    bad = [f"{check['name']}: {check['detail']}" for check in checks if not check.get("ok")]
    if status == 200:
        return [ok("server", f"ready at {url}")]
    return [fail("server", f"not ready: {'; '.join(bad)}", "see its log")]


async def models(settings: Settings) -> list[Finding]:
    """Which models can be reached, and which of them agents talk through."""
    registry = await model_registry(settings)
    try:
        cards = await registry.cards()
        default = await registry.resolve(1)
    finally:
        await registry.close()
    found = [_provider(provider, cards, settings) for provider in ("bedrock", "openai", "ollama", "offline")]
    return [*filter(None, found), *_default(default, cards, settings)]


def tools(settings: Settings) -> list[Finding]:
    """What the tools need from outside, and what agents may reach."""
    backends = {
        "Tavily": settings.tavily_api_key,
        "Brave": settings.brave_api_key,
        "SearXNG": settings.searxng_url,
    }
    there = [name for name, value in backends.items() if value]
    fix = "set OSHAANI_SEARCH_TAVILY_API_KEY, OSHAANI_SEARCH_BRAVE_API_KEY or OSHAANI_SEARCH_SEARXNG_URL"
    search = (
        ok("web search", ", ".join(there))
        if there
        else warn("web search", "no service: the tool is unavailable", fix)
    )
    return [search, _egress(settings)]


def _provider(provider: str, cards: Sequence[ModelCard], settings: Settings) -> Finding | None:
    own = [card for card in cards if card.provider == provider]
    name = f"models: {provider}"
    if own:
        shown = ", ".join(f"{card.name}{'' if card.tools else ' (no tools)'}" for card in own[:NAMED_MAX])
        more = f" and {len(own) - NAMED_MAX} more" if len(own) > NAMED_MAX else ""
        return ok(name, shown + more)
    if provider == "openai" and settings.openai_base_url is not None:
        fix = "check OPENAI_BASE_URL and OPENAI_API_KEY, and that it runs"
        return fail(name, f"{settings.openai_base_url} does not answer, or refuses the key", fix)
    if provider == "bedrock" and settings.aws_region is not None:
        return warn(name, "no models", "check the AWS credentials, the region, and access to models")
    return None


def _default(default: ModelCard | None, cards: Sequence[ModelCard], settings: Settings) -> list[Finding]:
    if default is None:
        return [fail("default model", "none", "start Ollama, or set OPENAI_API_KEY or OSHAANI_DEFAULT_MODEL")]
    found = [ok("default model", f"{default.name} ({default.price_class})")]
    if default.provider == "offline":
        fix = "start Ollama, set OPENAI_BASE_URL and OPENAI_API_KEY, or give AWS credentials and a region"
        found = [warn("default model", f"{default.name} only quotes what it is told", fix)]
    elif default.name not in {card.name for card in cards}:
        detail = f"{default.name} (OSHAANI_DEFAULT_MODEL) is not offered by its provider"
        found = [fail("default model", detail, "start the provider, pull the model, or name another")]
    elif not default.tools:
        found = [warn("default model", f"{default.name} cannot use tools", "choose one that can")]
    if is_given_away(default):
        found.append(warn("free calls", FREE_CALLS.format(model=default.name), "see the billing reference"))
    return found


def _egress(settings: Settings) -> Finding:
    openings = [str(network) for network in settings.egress_allow]
    ports = sorted(set(settings.egress_ports) - WEB_PORTS)
    if not openings and not ports:
        return ok("egress", "agents reach public addresses on ports 80 and 443 only")
    parts = [f"networks {', '.join(openings)}"] if openings else []
    parts += [f"ports {', '.join(map(str, ports))}"] if ports else []
    fix = "keep OSHAANI_EGRESS_ALLOW and OSHAANI_EGRESS_PORTS as narrow as what agents need"
    return warn("egress", f"agents also reach {' and '.join(parts)}", fix)
