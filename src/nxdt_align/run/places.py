"""The folders that a run reads and writes: experiments, caches and manifest."""

from __future__ import annotations

from pathlib import Path

from nxdt_align.config.schema import Config
from nxdt_align.errors import UserError
from nxdt_align.files import CHOOSE_ANOTHER, unwritable, unwritable_file


class Places:
    """Absolute folders of one configuration. Creates none, so that a run that stops early leaves nothing."""

    def __init__(self, config: Config) -> None:
        self._settings, self._cache_dir = config.exp_manager, config.data.cache_dir
        name = config.exp_manager.name or config.name
        self.experiments = config.experiments
        self.runs = self.experiments / name
        """The parent of the dated folders."""
        explicit = config.exp_manager.explicit_log_dir
        self.explicit = None if explicit is None else Path(explicit).absolute()
        """The folder that the user chose for this run, instead of a dated one."""
        # DPO and ORPO configurations may share a name, so the objective is part of the file's.
        objective = config.model_alignment_strategy.objective
        self.manifest = self.experiments / "compile" / f"{name}_{objective}.json"
        """The graphs that ``COMPILE=1`` compiled."""

    @property
    def tokens(self) -> Path:
        return self._cache("tokens")

    @property
    def reference(self) -> Path:
        return self._cache("reference")

    def _cache(self, what: str) -> Path:
        chosen = self._cache_dir
        return (Path(chosen) if chosen is not None else self.experiments / "cache") / what

    def require_writable(self) -> None:
        """Raise UserError if a folder that the run will write to cannot be created or written to."""
        if self.explicit is not None:
            _require_writable("exp_manager.explicit_log_dir", self.explicit)
        else:
            _require_writable("exp_manager.exp_dir", self.runs)
        self.require_writable_cache()

    def require_writable_cache(self) -> None:
        """The same, of the caches alone."""
        key = "exp_manager.exp_dir" if self._cache_dir is None else "data.cache_dir"
        _require_writable(key, self.tokens.absolute())


def require_page(page: Path) -> None:
    """Raise UserError where ``--out`` is no page that can be written, with its JSON beside it."""
    if page.suffix != ".html":
        raise UserError(f"out: must end in .html, as its JSON takes the same name, but is {page}")
    for file in (page, page.with_suffix(".json")):
        require_writable_file(file)


def require_writable_file(out: Path) -> None:
    """Raise UserError where ``out`` cannot be written. Creates nothing."""
    problem = unwritable_file(out)
    if problem is not None:
        raise UserError(f"out: {out} cannot be written{problem}; {CHOOSE_ANOTHER}")


def _require_writable(key: str, folder: Path) -> None:
    problem = unwritable(folder)
    if problem is not None:
        raise UserError(
            f"{key}: must be a folder that can be written to, but is {folder}{problem}; {CHOOSE_ANOTHER}"
        )
