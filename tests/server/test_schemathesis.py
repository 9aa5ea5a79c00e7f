"""schemathesis: requests made from /openapi.json, right and wrong ones. No 5xx, and every answer is as described.

A short run, the same each time. The long one, against a server that runs:

    schemathesis run http://127.0.0.1:8000/openapi.json --checks all --mode all --max-examples 300 \
        --exclude-checks positive_data_acceptance
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, not_a_server_error

from foveate.server.app import create_app
from foveate.server.settings import Settings

from .conftest import FakeEngine, make_tokenizer

EXAMPLES = 5  # of each kind for each operation
# A body may be right by the schema and refused all the same: a model or scheme of another name, too many tokens.
CHECKED = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    engine = FakeEngine(make_tokenizer())
    engine.script = "ok"
    # Its client calls the app "testserver", which a server on loopback alone does not answer to.
    options = Settings(model=engine.model_name, host="0.0.0.0", batch_dir=tmp_path_factory.mktemp("batch"))
    app = create_app(engine, options)
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    assert engine.pages_used == 0
    engine.shutdown(0)


def operations():
    """Each as ``method path``, and whether it takes anything that could be wrong: a text in a path never is."""
    paths = create_app(None, Settings(model="m")).openapi()["paths"]
    found = []
    for path, methods in paths.items():
        for method, operation in methods.items():
            found.append(pytest.param(path, method, GenerationMode.POSITIVE, id=f"right-{method}-{path}"))
            queries = [item for item in operation.get("parameters", ()) if item["in"] == "query"]
            if "requestBody" in operation or queries:
                found.append(pytest.param(path, method, GenerationMode.NEGATIVE, id=f"wrong-{method}-{path}"))
    return found


# Threads of other tests may draw random numbers at the same moment, for example an exporter that tries again.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize(("path", "method", "mode"), operations())
def test_operation(schema, path, method, mode):
    seen = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def run(case):
        seen.append(case.call_and_validate(checks=CHECKED).status_code)

    run()
    assert seen
    assert not_a_server_error in CHECKED
