"""Feature dashboards as one self-contained HTML page, of the same look as the graph page.

What a page shows is plain data, as ``FeatureReport.to_dict`` gives it: this module knows no model
and no bundle. Labels and tokens are hostile here too and travel as in ``page.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .page import fill_template

#: Version of the page's data; the script refuses another one.
DATA_VERSION = 1


def render_features(features: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The page as HTML text.

    Args:
        features: What is known of each (see ``FeatureReport.to_dict``); with more than one, the
            page has a list to choose from.
        title: Heading.

    Raises:
        InputError: A number is NaN or infinite, or something is no JSON.
    """
    data = {"version": DATA_VERSION, "title": title, "features": [dict(one) for one in features]}
    return fill_template("dashboard", "dashboard.js", data, "a feature's data")
