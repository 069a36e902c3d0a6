// Search of pages that are opened from disk, where browsers run no workers: a worker's script in a hidden frame.
if (location.protocol === "file:") {
  const run = (frame, url) =>
    new Promise((done, fail) => {
      const script = frame.document.createElement("script");
      Object.assign(script, { src: new URL(url, location.href), onload: done, onerror: fail });
      frame.document.head.append(script);
    });

  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.element = Object.assign(document.createElement("iframe"), { hidden: true, srcdoc: "<head></head>" });
      this.frame = new Promise((done, fail) => {
        this.element.onload = () => start().then(done, fail);
        const start = async () => {
          const frame = this.element.contentWindow;
          frame.importScripts = async (...urls) => {
            for (const each of urls) await run(frame, each);
          };
          frame.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
          await run(frame, url);
          return frame;
        };
      });
      this.frame.catch(() => this.dispatchEvent(new Event("error")));
      document.documentElement.append(this.element);
    }

    async postMessage(data) {
      const frame = await this.frame;
      frame.dispatchEvent(new frame.MessageEvent("message", { data }));
    }

    terminate() {
      this.element.remove();
    }
  };
}
