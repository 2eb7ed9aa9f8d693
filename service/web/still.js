"use strict";
/**
 * A picture as the service reads it: its first frame, upright. Browsers play animations, and some do not turn a WebP by
 * its EXIF orientation; the map would then lie over what the model did not see there. Other formats they turn.
 */
{
  // EXIF orientation -> the canvas transform that undoes it, for a picture of w x h pixels.
  const UPRIGHT = {
    1: () => [1, 0, 0, 1, 0, 0],
    2: (w) => [-1, 0, 0, 1, w, 0],
    3: (w, h) => [-1, 0, 0, -1, w, h],
    4: (w, h) => [1, 0, 0, -1, 0, h],
    5: () => [0, 1, 1, 0, 0, 0],
    6: (w, h) => [0, 1, -1, 0, h, 0],
    7: (w, h) => [0, -1, -1, 0, h, w],
    8: (w) => [0, -1, 1, 0, 0, w],
  };
  const ORIENTATION = 0x0112;
  const ANIMATED = 0x02; // among the flags of a WebP's VP8X chunk

  /**
   * @param {Blob} blob an image file
   * @returns {Promise<Blob>} itself, where browsers show what the service reads, or what cannot be read here
   */
  async function still(blob) {
    try {
      const view = new DataView(await blob.arrayBuffer());
      const { orientation, moves } = facts(view);
      return orientation === 1 && !moves ? blob : await redrawn(blob, orientation);
    } catch {
      return blob;
    }
  }

  function facts(view) {
    const found = { orientation: 1, moves: ascii(view, 0, 4) === "GIF8" || ascii(view, 4, 8) === "ftypavis" };
    if (ascii(view, 1, 3) === "PNG") found.moves = isAnimated(view);
    if (ascii(view, 0, 4) !== "RIFF" || ascii(view, 8, 4) !== "WEBP") return found;
    for (let at = 12; at + 8 <= view.byteLength; ) {
      const [name, size] = [ascii(view, at, 4), view.getUint32(at + 4, true)];
      if (name === "VP8X") found.moves = (view.getUint8(at + 8) & ANIMATED) !== 0;
      if (name === "EXIF") found.orientation = orientation(view, at + 8);
      at += 8 + size + (size % 2);
    }
    return found;
  }

  /** Whether a PNG says, before its pixels, that it is an animation. */
  function isAnimated(view) {
    for (let at = 8; at + 8 <= view.byteLength; at += 12 + view.getUint32(at)) {
      const name = ascii(view, at + 4, 4);
      if (name === "acTL" || name === "IDAT") return name === "acTL";
    }
    return false;
  }

  /** Of a TIFF block, which some writers begin with "Exif" and two zeros. */
  function orientation(view, start) {
    const tiff = ascii(view, start, 4) === "Exif" ? start + 6 : start;
    const little = ascii(view, tiff, 2) === "II";
    const fields = tiff + view.getUint32(tiff + 4, little);
    for (let index = 0; index < view.getUint16(fields, little); index += 1) {
      const field = fields + 2 + 12 * index;
      if (view.getUint16(field, little) !== ORIENTATION) continue;
      const value = view.getUint16(field + 8, little);
      return value in UPRIGHT ? value : 1;
    }
    return 1;
  }

  function ascii(view, at, length) {
    return String.fromCharCode(...Array.from({ length }, (_, index) => view.getUint8(at + index)));
  }

  async function redrawn(blob, turned) {
    const frame = await createImageBitmap(blob, { imageOrientation: "none" });
    const { width, height } = frame;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = turned < 5 ? [width, height] : [height, width];
    const context = canvas.getContext("2d");
    context.setTransform(...UPRIGHT[turned](width, height));
    context.drawImage(frame, 0, 0);
    frame.close();
    return new Promise((resolve) => canvas.toBlob((drawn) => resolve(drawn ?? blob), "image/png"));
  }

  Vitrine.still = still;
}
