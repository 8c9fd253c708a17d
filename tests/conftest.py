"""Shared checks are rewritten like tests, so that their asserts explain themselves."""

import pytest

pytest.register_assert_rewrite("tests.blob_loss_checks", "tests.tolerances")
