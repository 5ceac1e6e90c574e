"""Importing this imports all that a run imports: for processes that are forked to run."""

import lorafactory.launch
import lorafactory.run  # noqa: F401
from lorafactory import describe, models

describe.base_model("tiny")
models._loaded.clear()
