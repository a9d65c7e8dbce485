"""`python -m tests.zoo` writes docs/models.md."""

from tests.zoo.page import PAGE, page

PAGE.write_text(page())
