"use strict";
/** One namespace for all scripts; in it, elements and numbers, as the others need them. */
const Vitrine = {};
{
  const SVG = "http://www.w3.org/2000/svg";
  let ids = 0;

  /**
   * An HTML element. Texts become text nodes, whatever is in them: nothing is ever parsed as HTML.
   * @param {string} tag
   * @param {Object<string, *>} [attributes] `onclick` and the like are listeners; true, false and null as in HTML
   * @param {...*} children nodes, texts, lists of them; null and false are left out
   * @returns {HTMLElement}
   */
  function el(tag, attributes, ...children) {
    return filled(document.createElement(tag), attributes, children);
  }

  /** The same for SVG. @returns {SVGElement} */
  function svg(tag, attributes, ...children) {
    return filled(document.createElementNS(SVG, tag), attributes, children);
  }

  function filled(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return node;
  }

  /** A name for an element that another one refers to. @returns {string} */
  function newId() {
    ids += 1;
    return `vitrine-${ids}`;
  }

  /**
   * Put `children` in the place of what `parent` holds. The focus stays on what has the same `data-key`.
   * @param {Element} parent
   * @param {...*} children
   */
  function replace(parent, ...children) {
    const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    parent.replaceChildren(...children.flat(Infinity).filter(Boolean));
    if (focused === undefined) return;
    const same = [...parent.querySelectorAll("[data-key]")].find((node) => node.dataset.key === focused);
    same?.focus({ preventScroll: true });
  }

  /** "+0.717", "−0.115"; what is rounded to nothing has no sign. @returns {string} */
  function signed(value, digits = 3, plus = "+") {
    const text = Math.abs(value).toFixed(digits);
    return (Number(text) === 0 ? "" : value < 0 ? "−" : plus) + text;
  }

  /** Without a plus. @param {number} value @param {number} [digits] @returns {string} */
  function plain(value, digits = 3) {
    return signed(value, digits, "");
  }

  /** What is too small for three decimals: "+1.7e−7". @param {number} value @returns {string} */
  function tiny(value) {
    if (value === 0) return "0";
    return (value < 0 ? "−" : "+") + Math.abs(value).toExponential(1).replace("-", "−").replace("e+", "e");
  }

  /** "57.2 %" of 0.572. @param {number} share @param {number} [digits] @returns {string} */
  function percent(share, digits = 1) {
    return `${plain(share * 100, digits)}\u202f%`;
  }

  /** @param {number[]} values @returns {number} */
  function sum(values) {
    return values.reduce((total, value) => total + value, 0);
  }

  /**
   * A "?" that shows and hides a definition, with the keyboard as with the mouse.
   * @param {string} about what is defined
   * @param {string} text the definition
   * @returns {{button: HTMLElement, text: HTMLElement}} to be put where they belong
   */
  function hint(about, text) {
    const note = el("p", { id: newId(), class: "hint", hidden: true }, text);
    const button = el(
      "button",
      {
        type: "button",
        class: "ask",
        "aria-label": `What is ${about}?`,
        "aria-expanded": "false",
        "aria-controls": note.id,
        onclick: () => {
          note.hidden = !note.hidden;
          button.setAttribute("aria-expanded", String(!note.hidden));
        },
      },
      "?",
    );
    return { button, text: note };
  }

  /**
   * A region that scrolls by itself, so that the page never does sideways.
   * @param {string} name for those who do not see it
   * @param {...*} children
   * @returns {HTMLElement}
   */
  function scroller(name, ...children) {
    return el("div", { class: "scroller", role: "region", "aria-label": name, tabindex: "0" }, ...children);
  }

  Vitrine.dom = { el, svg, newId, replace, signed, plain, tiny, percent, sum, hint, scroller };
}
