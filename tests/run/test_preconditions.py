"""Other libraries' errors as the user's, by the module that they come from."""

from __future__ import annotations

import pytest

from nxdt_align.errors import UserError
from nxdt_align.run.preconditions import as_user_error


def error_of(module: str) -> Exception:
    return type("SomeException", (Exception,), {"__module__": module})("no such\n  run")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("wandb.errors.errors", "exp_manager.create_wandb_logger: no such run"),
        ("mlflow.exceptions", "exp_manager.create_mlflow_logger: no such run"),
        ("mlflow.tracking.registry", "exp_manager.create_mlflow_logger: no such run"),
        ("requests.exceptions", "exp_manager: a logger's server: no such run"),
    ],
)
def test_loggers_errors(module: str, said: str) -> None:
    with pytest.raises(UserError) as caught, as_user_error():
        raise error_of(module)
    assert str(caught.value) == said


@pytest.mark.parametrize("module", ["mlflowers", "builtins", "wandb.sdk"])
def test_others_stay_what_they_are(module: str) -> None:
    error = error_of(module)
    with pytest.raises(type(error)) as caught, as_user_error():
        raise error
    assert caught.value is error
