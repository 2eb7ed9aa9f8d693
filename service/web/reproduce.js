"use strict";
/** The curl line that asks for an answer again. */
{
  const { el } = Vitrine.dom;

  /** @param {string} text @returns {string} one word of a POSIX shell, whatever is in it */
  function quoted(text) {
    return `'${text.replaceAll("'", "'\\''")}'`;
  }

  /** A file for curl's -F. In double quotes commas and semicolons mean nothing; "-" alone would be standard input. */
  function filePart(name) {
    const path = name.startsWith("-") ? `./${name}` : name;
    if (/^[\w./ -]+$/.test(path)) return `image=@${path}`;
    return `image=@"${path.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;
  }

  /**
   * @param {Object} asked
   * @param {string} asked.url of the call
   * @param {string} asked.file the image's file name
   * @param {Object} asked.request
   * @param {boolean} asked.withKey whether a key is asked for; the line reads it from $VITRINE_KEY, never holds it
   * @returns {string}
   */
  function curl({ url, file, request, withKey }) {
    const key = withKey ? ['-H "Authorization: Bearer $VITRINE_KEY"'] : [];
    const body = Object.keys(request).length ? [`--form-string ${quoted(`request=${JSON.stringify(request)}`)}`] : [];
    return ["curl", ...key, `-F ${quoted(filePart(file))}`, ...body, quoted(url)].join(" ");
  }

  /** A command, and a button that copies it. @returns {HTMLElement} */
  function line(command, name = "curl line") {
    const code = el("code", {}, command);
    const said = el("span", { role: "status" });
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(command);
        said.textContent = "Copied.";
      } catch {
        getSelection().selectAllChildren(code); // without https the clipboard may be out of reach
        said.textContent = "Selected: copy it with the keyboard.";
      }
    };
    return el(
      "div",
      { class: "curl" },
      el("pre", { tabindex: "0", role: "region", "aria-label": name }, code),
      el("p", {}, el("button", { type: "button", "data-key": "copy", onclick: copy }, "Copy"), " ", said),
    );
  }

  Vitrine.reproduce = { curl, line, quoted };
}
