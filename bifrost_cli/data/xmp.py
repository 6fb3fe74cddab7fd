"""XMP packets that say what an image is: IPTC's DigitalSourceType, and our own provenance as one JSON property.

The mark is what other programs look for (IPTC Photo Metadata Standard 2025.1, XMP part 1); ours is for formats that
have no text chunks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from xml.etree import ElementTree
from xml.sax.saxutils import escape

_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
GENERATED = f"{_VOCABULARY}trainedAlgorithmicMedia"  # by a model, from a prompt or from latents
EDITED = f"{_VOCABULARY}compositeWithTrainedAlgorithmicMedia"  # by a model, from an image that was given
LONGEST = 2**20  # characters of a packet that are read

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_OURS = "urn:bifrost:provenance#"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{rdf}">
  <rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{iptc}" xmlns:xmp="{xmp}" xmlns:bifrost="{ours}">
{properties}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def xmp_packet(source_type: str, tool: str, facts: Mapping[str, str] | None = None) -> str:
    """An XMP packet, the same for the same input.

    Args:
        source_type: `GENERATED` or `EDITED`, the mark.
        tool: the program and its version.
        facts: what else to keep, by name; any text, since JSON escapes what XML cannot hold.

    Returns:
        The packet, to be written as UTF-8.
    """
    values = {"Iptc4xmpExt:DigitalSourceType": source_type, "xmp:CreatorTool": tool}
    if facts:
        values["bifrost:Provenance"] = json.dumps(dict(facts))
    properties = "\n".join(f"   <{name}>{escape(value)}</{name}>" for name, value in values.items())
    return _PACKET.format(rdf=_RDF, iptc=_IPTC, xmp=_XMP, ours=_OURS, properties=properties)


def xmp_facts(packet: str | bytes) -> dict[str, str]:
    """What a packet of anybody says: DigitalSourceType, CreatorTool, and the facts of `xmp_packet`.

    Nothing of a packet that is longer than `LONGEST`, declares entities, or is no XMP.
    """
    try:
        text = packet.decode("utf-8") if isinstance(packet, bytes) else packet
        if len(text) > LONGEST or "<!DOCTYPE" in text or "<!ENTITY" in text:
            return {}
        root = ElementTree.fromstring(text.rstrip("\0 \n"))
    except (ValueError, ElementTree.ParseError, RecursionError):
        return {}
    found: dict[str, str] = {}
    for described in root.iter(f"{{{_RDF}}}Description"):
        for space, name in ((_IPTC, "DigitalSourceType"), (_XMP, "CreatorTool")):
            value = described.get(f"{{{space}}}{name}") or described.findtext(f"{{{space}}}{name}") or ""
            found |= {name: value.strip()} if value.strip() else {}
        found |= _provenance(described.findtext(f"{{{_OURS}}}Provenance"))
    return found


def is_ours(packet: str | bytes) -> bool:
    """True for a packet that `xmp_packet` wrote: it says nothing beside what `xmp_facts` gives."""
    facts = xmp_facts(packet)
    source_type, tool = facts.pop("DigitalSourceType", ""), facts.pop("CreatorTool", "")
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    return text == xmp_packet(source_type, tool, facts)


def _provenance(text: str | None) -> dict[str, str]:
    try:
        facts = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return {name: value for name, value in facts.items() if isinstance(value, str)} if isinstance(facts, dict) else {}
