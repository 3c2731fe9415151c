// A canvas to draw on. Its value is the picture as the URL of an image file, drawn or chosen.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d", { willReadFrequently: true });
const chooser = element.querySelector("input"), notice = element.querySelector("p");
let fresh = true; // what is shown was not drawn here: the first stroke clears it
let last = null; // where the pen was
let later = null; // the next time that the drawing is sent

function clear() {
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

function show(url) {
  const image = new Image();
  image.onload = () => {
    clear();
    const scale = Math.min(canvas.width / image.width, canvas.height / image.height);
    const [width, height] = [image.width * scale, image.height * scale];
    pen.imageSmoothingEnabled = scale < 1;
    pen.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
  };
  image.onerror = clear;
  image.src = url;
  fresh = true;
}

function send(url) {
  props.value = url;
  trigger("input");
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

if (props.drawable) {
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (fresh) clear();
    fresh = false;
    last = place(event);
    stroke(event);
  });
  canvas.addEventListener("pointermove", (event) => last && stroke(event));
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (last = null));
}

function stroke(event) {
  const now = place(event);
  Object.assign(pen, { strokeStyle: "white", lineCap: "round", lineWidth: canvas.width / 12 });
  pen.beginPath();
  pen.moveTo(...last);
  pen.lineTo(...now);
  pen.stroke();
  last = now;
  later ??= setTimeout(() => {
    later = null;
    send(canvas.toDataURL());
  }, 50);
}

element.querySelector(".clear")?.addEventListener("click", () => {
  clear();
  fresh = false;
  send(canvas.toDataURL());
});
element.querySelector(".choose").addEventListener("click", () => chooser.click());
chooser.addEventListener("change", () => {
  const [file] = chooser.files;
  chooser.value = "";
  if (!file) return;
  notice.textContent = file.size > props.most ? `The file is too large: at most ${props.most / 2 ** 20} MB can be read.` : "";
  if (notice.textContent) return;
  const reader = new FileReader();
  reader.onload = () => {
    show(reader.result);
    send(reader.result);
  };
  reader.readAsDataURL(file);
});
show(props.value);
