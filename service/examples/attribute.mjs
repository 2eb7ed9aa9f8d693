// JavaScript's fetch, in Node (18 or newer) and, from `const form` on, in any browser.
//   node service/examples/attribute.mjs photo.jpg cat dog truck
import { openAsBlob } from "node:fs";

const [photo, ...labels] = process.argv.slice(2);
const url = process.env.URL ?? "http://127.0.0.1:3000";
const key = process.env.KEY ?? "none"; // only asked for where the service has VITRINE_API_KEYS

const form = new FormData();
form.append("image", await openAsBlob(photo), "photo");
form.append("request", JSON.stringify(labels.length ? { labels } : {}));
const response = await fetch(`${url}/v1/attribute`, {
  method: "POST",
  body: form,
  headers: { Authorization: `Bearer ${key}` },
});
const answer = await response.json();
if (!response.ok) {
  const { code, message, request_id } = answer.error;
  console.error(`${response.status} ${code}: ${message} (request ${request_id})`);
  process.exit(1);
}
for (const { label, probability } of answer.predictions) {
  console.log(`${(100 * probability).toFixed(1).padStart(5)}%  ${label}`);
}
const { target, logit, ledger } = answer.explanations[0];
const sum = [...ledger.attention, ...ledger.clt, ledger.prior, ledger.bias, ledger.error, ledger.remainder];
console.log(`\n${target}: ${sum.length} rows add up to ${sum.reduce((a, b) => a + b).toFixed(3)} of ${logit.toFixed(3)}`);
