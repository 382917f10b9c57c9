// What a person who cannot see well would miss on the page that is shown. Run in the browser by test_ui_access.py.
(() => {
  const isSeen = (node) => node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true });

  const nameOf = (node) => {
    const labelled = (node.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean);
    const inside = [...node.querySelectorAll("img[alt], svg title")].map((inner) => inner.alt || inner.textContent);
    return [
      node.getAttribute("aria-label"),
      node.title,
      node.innerText,
      ...labelled.map((id) => document.getElementById(id)?.innerText),
      ...[...(node.labels || [])].map((label) => label.innerText),
      ...inside,
    ].some((text) => text && text.trim());
  };

  /** Controls without a name. */
  const nameless = () =>
    [...document.querySelectorAll("button, input, textarea, select, a[href], [role=button], [role=tab]")]
      .filter((node) => isSeen(node) && node.type !== "hidden" && !nameOf(node))
      .map((node) => node.outerHTML.slice(0, 300));

  const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (above, below) => [0, 1, 2].map((i) => above[i] * above[3] + below[i] * (1 - above[3])).concat(1);

  /** Relative luminance (WCAG 2.2). */
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };

  const groundOf = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      layers.push(rgba(getComputedStyle(at).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reduceRight((below, above) => over(above, below), [255, 255, 255, 1]);
  };

  const contrastOf = (node) => {
    const ground = groundOf(node);
    const [low, high] = [luminance(over(rgba(getComputedStyle(node).color), ground)), luminance(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };

  const isLarge = (style) =>
    parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);

  /** Texts with too little contrast to their ground; what cannot be used yet is left out, as WCAG does. */
  const faint = () => {
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      const [text, node] = [texts.currentNode.textContent.trim(), texts.currentNode.parentElement];
      const isExempt = node.closest("[disabled], [aria-disabled=true], script, style, option, svg, .sr-only");
      if (!text || isExempt || !isSeen(node)) continue;
      const ratio = contrastOf(node);
      if (ratio < (isLarge(getComputedStyle(node)) ? 3 : 4.5))
        found.push(`${ratio.toFixed(2)} "${text.slice(0, 40)}" <${node.tagName.toLowerCase()} class="${node.className}">`);
    }
    return found;
  };

  const withoutAlt = () => [...document.images].filter((image) => !image.hasAttribute("alt")).map((image) => image.src);

  return { nameless: nameless(), faint: faint(), withoutAlt: withoutAlt() };
})();
