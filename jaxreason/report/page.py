"""Pages: one HTML file each, that needs no network and runs no script but its own."""

import base64
import hashlib
from importlib import resources

import jinja2
from markupsafe import Markup

from jaxreason.report.charts import COLOURS, svg


def render(template: str, **values: object) -> str:
    """``template``, which extends ``page.html``, with ``values``. Everything that is not markup of ours is escaped."""
    here = resources.files(__package__)
    style, script = ((here / f"page.{kind}").read_text() for kind in ("css", "js"))
    ours = {name: (here / name).read_text() for name in ("page.html", "parts.html")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.DictLoader({**ours, "this": template}),
    )  # fmt: skip
    environment.globals |= {"svg": svg, "colours": COLOURS}
    return environment.get_template("this").render(
        style=Markup(style), script=Markup(script), policy=_policy(style, script), **values
    )


def _policy(style: str, script: str) -> str:
    """A content security policy that allows this style and this script, by hash, and nothing else."""

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {hashed(style)}; script-src {hashed(script)}; base-uri 'none'; form-action 'none'"
