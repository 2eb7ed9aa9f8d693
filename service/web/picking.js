"use strict";
/** Ways to a picture: choosing a file, dropping or pasting one, taking an example. */
{
  const SIDE = 256; // pixels of an example, once it is drawn

  /**
   * @param {Object} parts of the page
   * @param {HTMLInputElement} parts.file the file input
   * @param {HTMLElement[]} parts.choosers buttons that open it
   * @param {HTMLElement} parts.examples holds buttons with an img each, `data-example` their names
   * @param {function(Blob, string, boolean)} onPicture gets the picture, its file name, whether the user has that file
   * @param {function(string)} onProblem gets a sentence
   */
  function listen({ file, choosers, examples }, onPicture, onProblem) {
    for (const button of choosers) button.addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      if (file.files.length) onPicture(file.files[0], file.files[0].name, true);
      file.value = ""; // so that the same file, changed, can be chosen again
    });

    let depth = 0; // dragenter comes again for every element under the pointer
    const dragged = (change) => {
      depth = Math.max(0, depth + change);
      document.documentElement.classList.toggle("dragging", depth > 0);
    };
    const hasFiles = (event) => [...event.dataTransfer.types].includes("Files");
    document.addEventListener("dragenter", (event) => hasFiles(event) && dragged(1));
    document.addEventListener("dragleave", (event) => hasFiles(event) && dragged(-1));
    document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      dragged(-depth);
      const [dropped] = event.dataTransfer.files;
      if (dropped) onPicture(dropped, dropped.name, true);
      else onProblem("What was dropped is not a file. Drop a photo from a folder.");
    });

    document.addEventListener("paste", (event) => {
      const [pasted] = event.clipboardData.files;
      if (pasted) onPicture(pasted, `pasted.${pasted.type.split("/")[1] ?? "png"}`, false);
    });

    examples.addEventListener("click", async (event) => {
      const button = event.target.closest("[data-example]");
      if (button) onPicture(await drawn(button.querySelector("img").src), `${button.dataset.example}.png`, false);
    });
  }

  /** An example's SVG as a PNG, which is what the service reads. @param {string} url @returns {Promise<Blob>} */
  async function drawn(url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
    return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }

  Vitrine.picking = { listen };
}
