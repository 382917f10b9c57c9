"""Under which license a file may be shared: that of its author, and that of the base it was made from."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..bases import FAMILY_TITLES, BaseInfo, FamilyName
from .facts import Facts


@dataclass(frozen=True)
class License:
    """As the Hub calls it, as people call it, and where it can be read."""

    id: str
    """`other` for what the Hub has no identifier of."""
    name: str
    link: str = ""


OF_FAMILY: dict[FamilyName, License] = {
    "sd1": License(
        "creativeml-openrail-m",
        "CreativeML Open RAIL-M",
        "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
    ),
    "sd2": License(
        "openrail++",
        "CreativeML Open RAIL++-M",
        "https://huggingface.co/stabilityai/stable-diffusion-2/blob/main/LICENSE-MODEL",
    ),
    "sdxl": License(
        "openrail++",
        "CreativeML Open RAIL++-M",
        "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/blob/main/LICENSE.md",
    ),
}
_APACHE = License("apache-2.0", "Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0")
_CREATIVE_COMMONS = re.compile(r"cc-(by(?:-nc)?(?:-sa|-nd)?)-([1-4]\.\d)")
_KNOWN = {
    license.id: license
    for license in (
        *OF_FAMILY.values(),
        _APACHE,
        License("mit", "MIT License", "https://opensource.org/license/mit"),
        License("cc0-1.0", "CC0 1.0", "https://creativecommons.org/publicdomain/zero/1.0/"),
        License("openrail", "OpenRAIL"),
        License("bigscience-openrail-m", "BigScience OpenRAIL-M"),
        License("unlicense", "The Unlicense", "https://unlicense.org"),
        License("agpl-3.0", "GNU Affero General Public License 3.0", "https://www.gnu.org/licenses/agpl-3.0.html"),
        License("gpl-3.0", "GNU General Public License 3.0", "https://www.gnu.org/licenses/gpl-3.0.html"),
    )
}
"""Identifiers of the Hub, https://huggingface.co/docs/hub/repositories-licenses, that are used for models like these;
any other one is told by its name, which is always right."""


def license_of_base(info: BaseInfo) -> License | None:
    """That of its family; None for random weights, which nobody made. A base may have one of its own besides."""
    return usual_license(info.model, info.family)


def usual_license(model: str, family: FamilyName) -> License | None:
    """Likewise, of a base by its name and family."""
    if model == "pocket":
        return _APACHE
    return None if model.startswith("random:") else OF_FAMILY[family]


def license_of(facts: Facts, info: BaseInfo) -> License | None:
    """The one given, or that of the base: what is trained from a base is a derivative of it."""
    given = facts.settings.license.strip()
    if not given:
        return license_of_base(info)
    if found := _CREATIVE_COMMONS.fullmatch(given.lower()):
        terms, version = found.groups()
        return License(
            given.lower(), f"CC {terms.upper()} {version}", f"https://creativecommons.org/licenses/{terms}/{version}/"
        )
    return _KNOWN.get(given.lower()) or License("other", given)


def license_note(facts: Facts, info: BaseInfo, base: str) -> str:
    """The text of a LICENSE file; `base` is the base's name. Empty where no license is known."""
    own, of_base = license_of(facts, info), license_of_base(info)
    lines = [f"# License of {facts.title}"]
    if own and facts.settings.license:
        by = f" by {facts.settings.author}" if facts.settings.author else ""
        lines.append(f"{facts.title} is published{by} under {_told(own)}.")
    elif own:
        lines.append(f"{facts.title} is published under the license of the base it was made from, {_told(own)}.")
    if of_base:
        which = "It is" if info.model == "pocket" else f"Models of the family {FAMILY_TITLES[info.family]} are"
        lines.append(
            f"It is a derivative of the base it was made from, `{base}`. {which} under {_told(of_base)}; what that "
            "forbids is forbidden here as well. The base may add terms of its own: see where it is published."
        )
    return "\n\n".join(lines) + "\n" if len(lines) > 1 else ""


def _told(license: License) -> str:
    return f"[{license.name}]({license.link})" if license.link else license.name
